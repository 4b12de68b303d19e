mezzotint prepare train.parquet --val val.parquet --out DATA
python benchmarks/scaling.py DATA --out GRID --sizes 3x128 4x192 6x256 6x384 --tokens 6000000 20000000 64000000 --batch 64 64 64 --device cuda --predict 35302019:1e9 35302019:1.04e10
