"""What one training run optimises: one module per task, found by name in `dina.stages.TASKS`."""
