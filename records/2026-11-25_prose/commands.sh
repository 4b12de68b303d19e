mezzotint prepare train.parquet --val val.parquet --vocab-size 4096 --out DATA
mezzotint train DATA --out RUN --preset small --warmdown 0.5 --lr-floor 0.0 --vocab-size 4096 --layers 6 --width 256 --heads 4 --kv-heads 4 --value-embedding-layers 6 --minutes 122
mezzotint pack RUN --out MODEL.mzt --data DATA
mezzotint prepare unseen.parquet --val unseen.parquet --tokenizer DATA/tokenizer.model --out UNSEEN
mezzotint score MODEL.mzt DATA --method causal --tokens 65536
mezzotint score MODEL.mzt UNSEEN --method causal --tokens 65536
mezzotint score MODEL.mzt DATA --method nelbo --tokens 32768 --repeats 4 --seed 0
mezzotint score MODEL.mzt UNSEEN --method nelbo --tokens 32768 --repeats 4 --seed 0
mezzotint score MODEL.mzt DATA --method chain --tokens 2048
