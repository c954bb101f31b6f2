"""What every package needs: reading and writing files."""
