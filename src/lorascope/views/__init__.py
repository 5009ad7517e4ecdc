"""Views: one function per page, from a study to a JSON-ready dict. They load no language model.

The report embeds what they give; each says what to run when its stage has not been.
"""
