"""DeepSpeed ZeRO-2: the engine and its configuration. The only package that imports deepspeed."""
