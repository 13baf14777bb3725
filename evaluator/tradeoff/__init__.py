"""What each setting of an ensemble costs and gains: overlap, precision, shifts, augmentation and members."""
