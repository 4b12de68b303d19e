mezzotint prepare train.parquet --val val.parquet --vocab-size 8192 --out DATA
mezzotint train DATA --out RUN --preset small --vocab-size 8192 --sequence-length 512 --layers 6 --width 384 --heads 6 --kv-heads 6 --value-embedding-layers 6 --batch 96 --short-share 0 --device cuda --minutes 4.02
mezzotint pack RUN --out MODEL.mzt --data DATA --tolerance 0.004
mezzotint prepare unseen.parquet --val unseen.parquet --tokenizer DATA/tokenizer.model --out UNSEEN
mezzotint score MODEL.mzt DATA --method causal --tokens 65536
mezzotint score MODEL.mzt UNSEEN --method causal --tokens 65536
mezzotint score MODEL.mzt DATA --method nelbo --tokens 32768 --repeats 4 --seed 0
mezzotint score MODEL.mzt UNSEEN --method nelbo --tokens 32768 --repeats 4 --seed 0
mezzotint score MODEL.mzt DATA --method chain --tokens 2048
