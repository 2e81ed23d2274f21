CONTEXTS={"a":{}}
TEMPLATES=[("x",["a"])]
