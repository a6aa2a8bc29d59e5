"""`align`'s losses inside other training libraries."""
