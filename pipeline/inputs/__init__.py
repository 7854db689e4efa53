"""What experts see: boxes, flow and pixels of a clip's views."""
