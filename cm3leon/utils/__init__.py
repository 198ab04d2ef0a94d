"""What every room may use: errors, progress, devices, image sheets."""
