"""What files hold on the disk: checksums of their contents, and errors of the disk in one line."""
