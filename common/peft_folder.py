"""Adapters in PEFT's own form: read a folder anyone wrote, write one that stock PEFT loads."""
