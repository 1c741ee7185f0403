"""`dist-qft push`: trained adapters and merged results as repositories of the Hugging Face Hub."""
