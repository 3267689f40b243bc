"""What only a device can show; skipped elsewhere."""
