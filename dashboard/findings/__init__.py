"""What pages say, worked out from what the store holds: rules, sentences and tables, without Streamlit."""
