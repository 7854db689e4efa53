"""The contract between teacher and student: views, frames, cache layout, writer, reader, mixing."""
