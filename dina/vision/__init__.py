"""Images to ids and back: preprocessing, encoder, bridge, quantizer, pixel decoder, refiner."""
