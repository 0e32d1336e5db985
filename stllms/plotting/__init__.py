"""Data -> figures and text for the eyes of a reader.

* :mod:`~stllms.plotting.axes`: draws data frames and sequences on the axes it is given
* :mod:`~stllms.plotting.text`: tables for display, and chains as coloured HTML or terminal text

Nothing here knows a stage: what is drawn comes as data.
"""
