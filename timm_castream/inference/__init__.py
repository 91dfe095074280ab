"""The model under explanation: its forwards, its images and its probabilities."""
