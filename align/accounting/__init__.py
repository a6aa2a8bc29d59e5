"""What training costs: by formula, by meter, and written down for each step and for the run."""
