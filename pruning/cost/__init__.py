"""What a calibration and a repair take, worked out from a config.json: `--estimate`."""
