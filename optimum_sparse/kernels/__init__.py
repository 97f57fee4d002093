"""The only room that asks what a device can do."""
