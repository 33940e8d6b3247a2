"""`tokenmerge compare`: methods and settings side by side, by accuracy, distortion and measured speed."""
