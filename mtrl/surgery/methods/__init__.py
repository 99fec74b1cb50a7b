"""The methods of gradient surgery, a file each."""
