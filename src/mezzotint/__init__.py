"""Mezzotint: masked-diffusion language models under a hard byte budget, with a number you can trust."""
