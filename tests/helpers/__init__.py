"""What several test files share; README.md of the tests says which to take."""
