"""What a key server costs, measured on the machine at hand: `keyreeve bench`."""
