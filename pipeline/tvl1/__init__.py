"""TV-L1 optical flow of image batches on CPU and GPU."""
