// A minimal server on Node's net module: each socket is piped to itself.
const server = require("net").createServer({ noDelay: true }, (client) => {
  client.on("error", () => client.destroy());
  client.pipe(client);
});
server.listen(0, "127.0.0.1", () => console.log(`listening on 127.0.0.1:${server.address().port}`));
