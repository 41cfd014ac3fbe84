"""What every other subpackage may use: errors, argument checks, constants, devices, precision, derivatives."""
