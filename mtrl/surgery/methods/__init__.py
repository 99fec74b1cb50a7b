"""Methods of gradient surgery, one file per method."""
