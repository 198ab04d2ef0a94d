"""The paper's claims, measured again at the scale of this project (``make study``)."""
