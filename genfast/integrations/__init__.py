"""Drop-in pieces for other libraries; each module stands alone and imports none of them."""
