"""Errors, argument checks, hand-written derivatives: what every floor above may use."""
