"What every test starts from."

import signal

# under `nohup` the commands ignore SIGHUP, as they should. The tests of SIGHUP need the signal that a
# closing terminal sends
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
