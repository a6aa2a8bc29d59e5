"""Everything that scores a response: judges, verifiers, final answers and unit tests."""
