"""The checks of scripts/gpu_check.py: what runs on a GPU is right, whole runs, and speed."""
