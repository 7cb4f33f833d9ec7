"""Speech: features, tokenizer (encoder, bridge, codes), mel decoder, flow matching, vocoder. Training is in tasks/."""
