"""Placement of parameters and activations on a DeviceMesh."""
