"The configs: one small file of plain assignments per run. `default.py` holds every value with its why; the rest only what differs."
