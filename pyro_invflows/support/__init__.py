"""Errors, argument checks, constants, hand-written derivatives: what every floor above may use."""
