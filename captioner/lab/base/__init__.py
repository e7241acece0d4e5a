"""How a base is made: sprites, architecture, encoder, language model, acceptance."""
