import scala.util.{Failure, Success, Try}

object KeyValueParser {
  private val Line = """\s*(\w+)\s*=\s*(.*?)\s*""".r

  def parse(text: String): Map[String, String] =
    text.linesIterator.collect { case Line(key, value) => key -> value }.toMap

  def intOf(settings: Map[String, String], key: String): Option[Int] =
    settings.get(key).flatMap(value => Try(value.toInt).toOption)

  def main(args: Array[String]): Unit =
    Try(parse("port = 8080\nhost = localhost")("port").toInt) match {
      case Success(port) => println(s"listening on $port")
      case Failure(error) => println(error.getMessage)
    }
}
