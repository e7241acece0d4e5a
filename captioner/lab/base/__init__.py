"""How the shipped base was made: sprites, architecture, encoder, language model, acceptance."""
