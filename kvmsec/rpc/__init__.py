"""The agent over mutual TLS: calls and their messages, authorization, server and client."""
