"""Human evaluation: blinded forms, and the results of filled ones."""
