"""From the names that other projects give to parameters, to those of our networks: a file for each project."""
