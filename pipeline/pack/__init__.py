"""Videos packed as pictures in one HDF5 file."""
