"""Errors, argument checks, constants, devices, hand-written derivatives: what every floor above may use."""
