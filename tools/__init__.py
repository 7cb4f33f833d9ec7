"""What people run around a training job."""
