mezzotint train DATA --out RUN --preset small --width 224 --heads 4 --kv-heads 4 --batch 16 --minutes 5.0 --steps 12000
mezzotint pack RUN --out MODEL.mzt
mezzotint score MODEL.mzt DATA --method nelbo --tokens 65536 --seed 0
mezzotint score MODEL.mzt DATA --method nelbo --tokens 65536 --seed 1
mezzotint score MODEL.mzt DATA --method nelbo --tokens 65536 --seed 2
mezzotint score MODEL.mzt DATA --method chain --tokens 8192
mezzotint score MODEL.mzt DATA --method causal --tokens 65536
