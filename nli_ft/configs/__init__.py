"The configs: one small file of plain assignments per run. `default.py` holds every value with its reason. The other files hold only what differs."
