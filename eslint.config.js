// Rules for the JavaScript of the web page and of its tests. Prettier does the formatting.

import js from "@eslint/js";
import globals from "globals";

export default [
  js.configs.recommended,
  {
    linterOptions: { reportUnusedDisableDirectives: "error" },
    rules: {
      eqeqeq: "error",
      "no-constructor-return": "error",
      "no-promise-executor-return": "error",
      "no-self-compare": "error",
      "no-shadow": "error",
      "no-template-curly-in-string": "error",
      "no-unmodified-loop-condition": "error",
      "no-unreachable-loop": "error",
      "no-unused-expressions": ["error", { allowShortCircuit: true }],
      "no-use-before-define": ["error", { functions: false, classes: false, variables: false }],
      "no-var": "error",
      "object-shorthand": "error",
      "prefer-const": ["error", { destructuring: "all" }],
      "prefer-template": "error",
    },
  },
  {
    files: ["src/gptsmith/server/web/*.js"],
    languageOptions: { globals: globals.browser },
    rules: { "no-console": "error", "no-restricted-globals": ["error", "event", "name", "length", "status", "top"] },
  },
  { files: ["src/gptsmith/server/web/theme.js"], languageOptions: { sourceType: "script" } },
  { files: ["tests/web/*.js"], languageOptions: { globals: globals.node } },
];
