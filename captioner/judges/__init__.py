"""What says whether a caption is true, and the gate of a round."""
